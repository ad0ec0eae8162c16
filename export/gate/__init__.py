"""What is compared before an artifact is published."""
