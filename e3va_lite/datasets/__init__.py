"""The layouts of Pascal VOC, COCO and ADE20K: read, checked, and generated."""
