"""What the application asks for as protocols, done with SQLAlchemy, SMTP, argon2 and structlog."""
