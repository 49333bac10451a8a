"""What neurons know: which of them tell the labels of a task apart, and how well they do without the model's head."""
