"""FlexAttention: scores that a function of the user's changes, and masks that one describes."""
