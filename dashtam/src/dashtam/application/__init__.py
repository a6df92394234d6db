"""What Dashtam does, and what follows from it. Knows what it needs of the outside as protocols, not who provides it."""
