"""Networks: stems, weight initialisation, ResNets."""
