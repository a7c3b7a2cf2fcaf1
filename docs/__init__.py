"""What draws the pictures and plots of the pages."""
