"""What Dashtam is about: users, their settings, and what happens to them. Knows no database and no web."""
