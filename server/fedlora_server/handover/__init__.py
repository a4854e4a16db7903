"""What becomes of a finished run: its adapter or merged model to hand on, its predictions, and its texts."""
