"""What is asked: weights and where they come from, where neurons live, and how a token is paid for once."""
