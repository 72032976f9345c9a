"""avid: self-supervised learning from video and sound, after two papers. Start reading at train.py."""
