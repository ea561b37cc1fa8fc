"""augment: databases and tools beside a frozen model."""
