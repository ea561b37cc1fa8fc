"""prompt: inputs."""
