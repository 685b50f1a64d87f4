"""Train sparse layers with learned shuffles; compile the shuffles away."""
