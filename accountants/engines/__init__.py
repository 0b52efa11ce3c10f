"""How bounds are computed: closed forms, lattice laws, contour inversion, and the package prv_accountant."""
