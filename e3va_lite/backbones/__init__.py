"""What a pretrained backbone has to offer, and the families that offer it."""
