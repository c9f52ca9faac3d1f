"""What the end-to-end cases stand on: private daemons, images, guests, and the check that nothing is left behind."""
