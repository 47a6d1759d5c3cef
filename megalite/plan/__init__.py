"""What a configuration costs, on which ranks it fits, and how it is laid out. No torch here."""
