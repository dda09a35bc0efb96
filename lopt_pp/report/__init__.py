"""What a run tells about itself: trackers, traces, the health of its interfaces, reports."""
