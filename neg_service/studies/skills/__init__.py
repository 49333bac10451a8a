"""Skill neurons: which ones tell the labels of a task apart, and how well a few of them do the task alone."""
