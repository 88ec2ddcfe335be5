"""The router: one process between all clients and all groups.  Entry: process.main()."""
