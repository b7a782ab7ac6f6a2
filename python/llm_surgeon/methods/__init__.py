"""Costs, selection and updates of weights, one module for each way to prune them."""
