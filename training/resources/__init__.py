"""What a training needs: GPU memory, main memory, disk; estimated before, tried on request."""
