"""FlexAttention: attention whose scores and masks are functions of the caller's."""
