"""What runs that are too large to try here need, by arithmetic."""
