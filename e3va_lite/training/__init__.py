"""From a recipe to a trained model: the loop, what it keeps on disk, and what is done with it afterwards."""
