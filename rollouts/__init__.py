"""What the policy did: batches of rollouts, the engines that generate them, their rewards."""
