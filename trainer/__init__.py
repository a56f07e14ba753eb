"""The client: routing, remote calls under autograd, model, data and the training loop."""
