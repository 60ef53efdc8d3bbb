"""The dial study: templates in noise, whose separability and Bayes error are known."""
