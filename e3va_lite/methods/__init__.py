"""Every way of tuning under one contract."""
