"""Text to measure and calibrate on."""
