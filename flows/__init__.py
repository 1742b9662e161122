"""What runs, in which order, when. The only floor that knows Prefect."""
