"""Where in the network two policies part."""
