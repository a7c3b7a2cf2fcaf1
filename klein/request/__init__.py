"""What was asked, checked and decided."""
