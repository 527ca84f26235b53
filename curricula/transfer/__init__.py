"""What training on one domain does to the others: the matrix, its effects, orders and the plan."""
