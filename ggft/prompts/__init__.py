"""Conversations rendered by chat templates, and the mask of what is trained."""
