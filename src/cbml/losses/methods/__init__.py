"""What is more than a loss: heads, samplers and teachers that go with it."""
