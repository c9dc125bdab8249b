"""The pages made of a workdir's results."""
