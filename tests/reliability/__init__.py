"""Campaigns: hundreds of faults with a fixed seed and a summary line each; the suite runs a short version."""
