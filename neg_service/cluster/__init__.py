"""Who does the work: the plan, the replicas, what is done about failures, and the driver that runs them."""
