"""What a sampled response goes through before it is trained on: how its tokens are drawn, and the rewards."""
