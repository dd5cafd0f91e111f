"""Every operation of the clients with every fault at each of its requests.

``PYTHONPATH=tests python -m fault_matrix`` runs all cells and prints the table; pytest runs some.
"""
