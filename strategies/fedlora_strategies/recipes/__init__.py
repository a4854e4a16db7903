"""The strategies, one file for each paper. `RECIPE` names the parts; a class makes a Flower strategy of them."""
