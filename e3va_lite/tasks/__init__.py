"""The three networks, and the three tasks that join network, data set and metric."""
