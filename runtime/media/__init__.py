"""Attachments: files read, cut into images and clips, and encoded to soft tokens."""
