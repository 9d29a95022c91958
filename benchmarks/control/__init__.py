"""Control with learned models: what a filter, a lookahead and a smoother do to the controller of a linear system."""
