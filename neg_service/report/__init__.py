"""What people look at: text for a terminal, and plots."""
