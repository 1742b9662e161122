"""Systems: compositions of trainables. One file per trainable, one per composition."""
