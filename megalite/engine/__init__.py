"""The engine of one rank: stages that run forward, and what learns."""
