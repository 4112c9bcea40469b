"""What lies on disk: stage folders, their children, where things are."""
