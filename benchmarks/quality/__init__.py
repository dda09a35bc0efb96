"""What each way of training learns, and what it forgets."""
