"""What stands around the method: commands and pictures, nothing that training needs to compute a step."""
