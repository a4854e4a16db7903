"""The strategies, one file for each paper: its `RECIPE` is a `Recipe`, its class makes that a Flower strategy."""
