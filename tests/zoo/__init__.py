"""Real architectures, built tiny from their configurations, on which engines are held to plain autograd."""
